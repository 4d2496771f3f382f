"""Datasets: any public format in, records out; records in, tokens with exact masks out.

The way of a row, from `data=NAME` to a `Record` of a `RecordSet` (`load.py` holds the steps together):

    catalog        a spec (NAME, a file, a folder, hf://owner/name, each with :options) -> dataset and its settings
       |
       v
    sources        dataset -> open file, folder or hub dataset -> raw rows
       |           containers/: json_files (and YAML), text_files (and CSV), arrow_files; folders chooses a split
       v
    load           raw row -> records, checked one by one -> the kind of record that a stage asks for
       |           formats/: the table of formats, one reader each; row_layout: which column plays which part
       |           row_errors: what is refused, and how it is shown; vote_filter: which votes are wanted
       |           mixtures: how many rows each of several datasets gives
       v
    record_sets    the digest of the whole; repeats, contradictions, bias, leaks

A new format is a reader and one entry in `formats/__init__.py`; a new kind of file one entry in `sources.py`.
`rendering/` turns records into tokens and masks.
"""

from align.data.load import load_records
from align.data.record_sets import RecordSet

__all__ = ["RecordSet", "load_records"]
