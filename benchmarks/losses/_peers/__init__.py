"""One module a peer: its own functions, called as its documentation says. A peer is imported when it is called."""
