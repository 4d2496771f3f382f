"""The HTTP API: an engine's models under OpenAI's paths, behind a guard, with limits, metrics and a graceful shutdown.

`create_app` makes it of any engine; `align.serve` is the command. Nothing here loads weights.
"""
