"""Reading prompts into a cache and writing on: prefill, sampling, generation."""
