"""The only room that loads and saves weights: bases, quantization, adapters, score heads."""
