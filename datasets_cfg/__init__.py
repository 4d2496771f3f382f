"""One YAML a dataset; `align.data.catalog` reads them."""
