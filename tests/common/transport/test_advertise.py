"""Another host in an address, and nothing else."""

import pytest

from common.transport.advertise import advertised
from protos.status_pb2 import Endpoint


@pytest.mark.parametrize(
    ("bound", "told"),
    [
        ("tcp://10.0.0.7:4100", "tcp://gateway:4100"),
        ("10.0.0.7:4101", "gateway:4101"),
        ("[fe80::1]:4102", "gateway:4102"),
        ("ipc:///run/dvd/zmq-1.sock", "ipc:///run/dvd/zmq-1.sock"),
        ("unix:/run/dvd/grpc-1.sock", "unix:/run/dvd/grpc-1.sock"),
    ],
)
def test_hosts_are_replaced_and_sockets_stay(bound, told):
    endpoint = advertised(Endpoint(transport="any", address=bound), "gateway")
    assert (endpoint.transport, endpoint.address) == ("any", told)


def test_nothing_is_replaced_by_default():
    endpoint = Endpoint(transport="zmq", address="tcp://10.0.0.7:4100")
    assert advertised(endpoint, None) is endpoint
