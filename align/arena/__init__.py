"""Judging models side by side: battles, votes and the page that shows them.

`battles` holds the state of one comparison and knows no page, `votes` keeps what was decided, `app` is the page, each
of whose tabs is a module with a class of its components and handlers.
"""
