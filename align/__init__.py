"""Parameter-efficient fine-tuning and RLHF: one record, one base with many adapters, one registry."""

__version__ = "0.1.0"
