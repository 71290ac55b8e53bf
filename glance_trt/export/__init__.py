"""From a model and LoRAs to portable graphs and weights (needs the `export` extra)."""
