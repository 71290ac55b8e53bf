"""Running a bundle: text to images with numpy and one engine backend, without PyTorch."""
