"""Datasets: any public format in, records out; records in, tokens with exact masks out."""

from align.data.load import RecordSet, load_records

__all__ = ["RecordSet", "load_records"]
