# SPDX-License-Identifier: MIT
"""Post-copy migration of a task tree with the real CRIU, from one `lazyd migrate` to another.

    destination                                    source
    lazyd migrate --listen PORT -D DIR             lazyd migrate --pid PID --to HOST:PORT
                       <── control: hello ──────
                       <── pages: its token ────   guard ── criu dump --lazy-pages --ps-socket
                       <── the small images ────
    lazyd lazy-pages --ps-socket
                       ─── restoring ──────────>   from here on the source is not let go
                       <── go ──────────────────
    criu restore --lazy-pages
                       ─── running, or failed ─>   failed: it is let go, and goes on as it was
                       ─── full ───────────────>   it is gone

The destination needs one open port, the source none. Both connections may be TLS.

Facts this rests on (seen, 4.1.1 and 4.2.1): the dumper takes the end of its connection for success and kills the task;
a connection that is reset is a failure, after which the task goes on. So the dumper has one end of a connection inside
the source, and `guard` the other: it passes pages on, never an end, and while no copy has run it is made so that
whatever ends it, be it kill -9, resets the dumper's connection. Once a copy may have run, it is the other way about:
two of a task must never run, so the source stands still until its copy has all pages, or somebody decides. If the
dumper dies meanwhile, `brake` has it stand still all the same.
"""
