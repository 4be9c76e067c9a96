"""The feature plane over plain sockets: frames straight from the sender's memory into the sink's, a few links per peer.

Nobody stands between us and the kernel, so a payload is copied only there. What a link says is in ``tcp_wire.py``. A
peer that says nothing for ``SILENCE`` is gone: that notices a half-open connection and a stopped process, which TCP
alone does not.

Knows nothing of encryption: use a private directory or a trusted network.
"""

from common.transport.listen import PRIVATE_DIRECTORY, check_host_port, new_socket_path
from common.transport.sender import TransportLimits
from common.transport.tcp_receiver import TcpReceiver
from common.transport.tcp_sender import TcpSender
from common.transport.tcp_wire import NAME, UNIX


def receiver_at(listen: str, limits: TransportLimits) -> TcpReceiver:
    """See ``common.transport.registry``. Raises ConfigError."""
    if listen.startswith(PRIVATE_DIRECTORY):
        return TcpReceiver(f"{UNIX}{new_socket_path(listen, NAME)}", limits)
    return TcpReceiver(check_host_port(listen), limits)


sender_to = TcpSender
