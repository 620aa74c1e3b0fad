"""The decoder: `LayerSpec`s in, hidden states out. No loss, no optimizer, no data."""
