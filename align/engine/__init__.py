"""Text generation for many adapters at once: requests in, streamed rows out.

`protocol` names what goes in and comes out; `local` runs it on a loaded model in one thread, `remote` asks a server
of the OpenAI API, `fake` stands in for a model. Nothing here knows the page or the server.
"""
