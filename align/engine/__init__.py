"""Text generation for many adapters at once: requests in, streamed rows out.

`protocol` defines requests and events; `local` runs a loaded model in one thread, `remote` requests a server of the
OpenAI API. Nothing here knows the page or the server.
"""
