"""Notice that a model's process or its server is lost, of which neither notices all. Level 5; no torch.

A Python backend's stub can be ended by a request that never reaches the model: docs/pitfalls.md names one. The server
then refuses every request to the model, while all of its health endpoints go on saying that it is ready. And a stub
that runs a request when its server dies may wait for that server for ever.
"""

from __future__ import annotations

import os
import subprocess

# A shell, because the interpreter in the stub may have no program of its own to start, and it costs a megabyte. It
# reads the pipe that the stub holds open: a line means that the model is being unloaded; its end without one, that the
# stub is gone. $1 is the model, $2 the server's process id, $3 whether to end it, $4 the stub's process id. A process
# id may have a new owner by then, so its name is compared with the one it had. Meanwhile a second shell looks for the
# server; a stub that is idle ends by itself within seconds of it, and gets the time for that.
_SCRIPT = r"""
before="$(cat "/proc/$2/comm" 2>/dev/null)"
(
	while [ -n "$before" ] && [ "$(cat "/proc/$2/comm")" = "$before" ]; do sleep 1; done
	sleep 5
	kill -KILL "$4"
) >/dev/null 2>&1 &
watching=$!
read -r _ && said=yes || said=no
kill "$watching"
[ "$said" = yes ] && exit 0
[ -n "$before" ] && [ "$(cat "/proc/$2/comm" 2>/dev/null)" = "$before" ] || exit 0
if [ "$3" = stop ]; then then="the server is told to end"; else then="the server goes on without it"; fi
printf 'error: the process of model %s has ended; %s\n' "$1" "$then" >&2
printf '  Why: a request ended it before the model saw it, or the machine ran out of memory\n' >&2
printf '  Fix: load the model again or restart the server; health endpoints still call the model ready\n' >&2
[ "$3" = stop ] && kill -TERM "$2"
exit 0
"""


class ProcessGuard:
    """Watches the process that makes it, until `release`; ends it if it is still there five seconds after the server.

    Args:
        model: name of the model, for the message on standard error.
        server: process id of the server.
        stop_server: end the server with SIGTERM when this process is lost, so that whoever started it starts it again.
    """

    def __init__(self, model: str, server: int, stop_server: bool) -> None:
        lost = "stop" if stop_server else "report"
        command = ["/bin/sh", "-c", _SCRIPT, "guard", model, str(server), lost, str(os.getpid())]
        # A session of its own: a signal to the server's group must not end what reports it.
        self._guard = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    @classmethod
    def of_this_process(cls, model: str, stop_server: bool) -> ProcessGuard:
        """For a stub: its parent is the server."""
        return cls(model, os.getppid(), stop_server)

    def release(self) -> None:
        """This process ends on purpose."""
        assert self._guard.stdin is not None
        try:
            self._guard.stdin.write(b"released\n")
            self._guard.stdin.close()
        except BrokenPipeError:
            pass  # somebody ended the guard; there is nobody to tell
        self._guard.wait()
