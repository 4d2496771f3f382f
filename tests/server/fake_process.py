"""A server process over an engine that recites; started by a test, which reads its address from the first line.

An answer goes on after its first word when the test has written a line.
"""

import sys
import threading

from serving import PATIENCE, poet, served

from align.network import open_port
from align.server.application import address_of, create_app, serve_until_ended
from align.server.limits import ServerLimits

gate = threading.Event()
threading.Thread(target=lambda: (sys.stdin.readline(), gate.set()), daemon=True).start()
with open_port("127.0.0.1", 0) as listener:
    app = create_app(poet(0.01, gate=gate), served("red@v1"), ServerLimits(drain_seconds=9 * PATIENCE), None)
    sys.stdout.write(address_of(listener) + "\n")
    sys.stdout.flush()
    serve_until_ended(app, listener, app.state.service)
sys.stdout.write("ended\n")
