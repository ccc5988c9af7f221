# SPDX-License-Identifier: MIT
"""TLS for connections of the page server's protocol: a connected socket goes in, a plain one comes out.

    endpoint = Endpoint(Files(...), Side.CLIENT)            # reads certificates and keys, and says what is wrong
    tunnel = endpoint.open(connection, "source.example")    # shakes hands, and says what is wrong
    tunnel.plain                                            # a stream socket: whoever moves pages needs no more
    tunnel.ending()                                         # once it has ended: in good order, or did the link break?

`settings` is what the user names, `handshake` who the peer is, `revocation` who is not any more, and `pump` moves the
bytes, in a process or a thread of its own. Only `settings` is imported before somebody wants TLS: ssl takes its time.
"""
