"""A server process over an engine that recites, with few descriptors; a test reads its address from the first line."""

import resource
import sys

from serving import PATIENCE, poet, served

from align.network import open_port
from align.server.application import address_of, create_app, serve_until_ended
from align.server.limits import ServerLimits

resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
with open_port("127.0.0.1", 0) as listener:
    app = create_app(poet(0.01), served("red@v1"), ServerLimits(drain_seconds=PATIENCE, body_seconds=PATIENCE), None)
    sys.stdout.write(address_of(listener) + "\n")
    sys.stdout.flush()
    serve_until_ended(app, listener, app.state.service)
