"""Datasets: any public format in, records out; records in, tokens with exact masks out.

The way of a row, from `data=NAME` to a `Record` of a `RecordSet` (`load.py`, `scan.py`):

    catalog        a spec: NAME, a file, a folder, hf://owner/name, each with :options
       |           dataset_config: the settings, as a file, a hub, a votes or a mixture dataset
       v
    sources        the path, or the hub dataset, that the settings name
       |
       v
    containers/    bytes -> raw rows: json_files, csv_files, arrow_files, text_files; folders choose a split
       |
       v
    formats/       raw row -> records: the table of formats, one reader each; row_layout says which column is what
       |           read_rows: chooses the format, reads each row, checks each record; row_errors: what is refused
       v
    views          the kind of record that a stage asks for
       |           mixtures: how many rows each of several datasets gives
       v
    set_checks     repeats, contradictions, bias, leaks;  digest: the identity of the whole

A new format is a reader and one entry in `formats/__init__.py`; a new kind of file one entry in
`containers/__init__.py`. Rendering (records to tokens) begins at `render`.
"""

from align.data.load import RecordSet, load_records

__all__ = ["RecordSet", "load_records"]
