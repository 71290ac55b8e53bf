"""The native library's C ABI as Python calls it: a thin layer over ctypes, for the tests."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_char_p, c_double, c_float, c_int32, c_int64, c_size_t, c_uint8, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Progress = Callable[[str, int, int], int | None]
Log = Callable[[int, str], None]

KINDS = {1: "other", 6: "bundle", 7: "target", 8: "input", 12: "unsupported", 130: "cancelled"}
_LOG = ctypes.CFUNCTYPE(None, c_void_p, c_int32, c_char_p)
_PROGRESS = ctypes.CFUNCTYPE(c_int32, c_void_p, c_char_p, c_uint64, c_uint64)
_RESULTS = {
    "glance_version": c_char_p,
    "glance_error_kind": c_int32,
    "glance_error_message": c_char_p,
    "glance_bundle_target": c_char_p,
    "glance_bundle_manifest": c_char_p,
    "glance_bundle_sha256": c_char_p,
    "glance_images_count": c_size_t,
    "glance_images_height": c_size_t,
    "glance_images_width": c_size_t,
    "glance_images_pixels": ctypes.POINTER(c_uint8),
}


class NativeError(Exception):
    """An error of the library; `kind` by its name in glance.h, in lower case."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class Library:
    """The library, and the ONNX Runtime that it is to load."""

    def __init__(self, path: Path, onnxruntime: Path) -> None:
        self._library, self._onnxruntime = ctypes.CDLL(str(path)), onnxruntime
        for name, kind in _RESULTS.items():
            getattr(self._library, name).restype = kind

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function; text becomes bytes. Functions that may fail raise `NativeError`."""
        function = getattr(self._library, name)
        if name not in _RESULTS:
            function.restype = None if name.endswith(("_free", "_cancel", "glance_noise")) else c_void_p
        result = function(*(item.encode() if isinstance(item, str) else item for item in arguments))
        if name in _RESULTS or result is None:
            return result
        error = c_void_p(result)
        kind = KINDS[self._library.glance_error_kind(error)]
        text = self._library.glance_error_message(error).decode()
        self._library.glance_error_free(error)
        raise NativeError(kind, text)

    def noise(self, seed: int, count: int) -> NDArray[np.float32]:
        values = np.full(count, np.nan, np.float32)
        self.call("glance_noise", c_uint64(seed), values.ctypes.data_as(ctypes.POINTER(c_float)), c_size_t(count))
        return values

    def verify(self, folder: Path, **options: Any) -> None:
        with Options(self, **options) as given:
            self.call("glance_bundle_verify", str(folder), given)

    def open(self, folder: Path, **options: Any) -> Bundle:
        return Bundle(self, folder, **{"onnxruntime": str(self._onnxruntime)} | options)


class Handle:
    """An object of the library, which is freed at the end of a ``with``, or with `free`."""

    def __init__(self, library: Library, kind: str, handle: c_void_p) -> None:
        self.library, self._kind, self._as_parameter_ = library, kind, handle

    def free(self) -> None:
        self.library.call(f"glance_{self._kind}_free", self._as_parameter_)
        self._as_parameter_ = c_void_p()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_error: object) -> None:
        self.free()


class Options(Handle):
    def __init__(self, library: Library, **options: Any) -> None:
        handle = c_void_p()
        library.call("glance_options_create", ctypes.byref(handle))
        super().__init__(library, "options", handle)
        self.callbacks: list[Any] = []
        for name, value in {"cache": "", **options}.items():
            if name == "log":
                self.callbacks.append(_LOG(lambda _, level, text, log=value: log(level, text.decode())))
                value = (self.callbacks[-1], None)
            elif name == "progress":
                self.callbacks.append(as_progress(value))
                value = (self.callbacks[-1], None)
            self.library.call(f"glance_options_set_{name}", self, *(value if isinstance(value, tuple) else (value,)))


class Bundle(Handle):
    def __init__(self, library: Library, folder: Path, **options: Any) -> None:
        handle = c_void_p()
        with Options(library, **options) as given:
            library.call("glance_bundle_open", str(folder), given, ctypes.byref(handle))
            self._callbacks = given.callbacks
        super().__init__(library, "bundle", handle)

    def text(self, what: str) -> str:
        """Its target, manifest or sha256."""
        return self.library.call(f"glance_bundle_{what}", self).decode()

    def session(self, **wishes: Any) -> Session:
        return Session(self, **wishes)

    def generate(self, **wishes: Any) -> list[NDArray[np.uint8]]:
        with self.session(**wishes) as session:
            return session.run()


class Session(Handle):
    """tokens, negative_tokens: ids by tokenizer. Other wishes are called as the functions that set them."""

    def __init__(self, bundle: Bundle, **wishes: Any) -> None:
        handle = c_void_p()
        bundle.library.call("glance_session_create", bundle, ctypes.byref(handle))
        super().__init__(bundle.library, "session", handle)
        for name, value in wishes.items():
            self.set(name, value)

    def set(self, name: str, value: Any) -> None:
        function = f"glance_session_set_{name}"
        if name in ("tokens", "negative_tokens"):
            for tokenizer, ids in value.items():
                array = (c_int64 * len(ids))(*ids)
                self.library.call(function, self, tokenizer, array, c_size_t(len(ids)))
        elif name == "latents":
            array = np.ascontiguousarray(value, np.float32)
            self.library.call(function, self, array.ctypes.data_as(c_void_p), c_size_t(array.size))
        elif name == "image":
            array = np.ascontiguousarray(value, np.uint8)
            self.library.call(function, self, array.ctypes.data_as(c_void_p), *map(c_int32, array.shape[:2]))
        elif name == "progress":
            self._progress = as_progress(value)
            self.library.call(function, self, self._progress, None)
        elif name == "size":
            self.library.call(function, self, *map(c_int32, value))
        elif name == "seed":
            self.library.call(function, self, c_uint64(value))
        else:
            self.library.call(function, self, c_double(value) if isinstance(value, float) else value)

    def run(self) -> list[NDArray[np.uint8]]:
        """Images [height, width, 3]."""
        handle = c_void_p()
        self.library.call("glance_session_run", self, ctypes.byref(handle))
        call = self.library.call
        with Handle(self.library, "images", handle) as images:
            shape = (call("glance_images_height", images), call("glance_images_width", images), 3)
            found = [
                call("glance_images_pixels", images, c_size_t(i)) for i in range(call("glance_images_count", images))
            ]
            assert not call("glance_images_pixels", images, c_size_t(len(found)))
            return [np.ctypeslib.as_array(pixels, shape).copy() for pixels in found]

    def cancel(self) -> None:
        self.library.call("glance_session_cancel", self)


def as_progress(report: Progress) -> Any:
    return _PROGRESS(lambda _, stage, done, total: report(stage.decode(), done, total) or 0)
