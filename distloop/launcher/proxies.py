"""HTTP proxies of the environment. TensorFlow's gRPC sends what workers say to each other to them, and hangs there.

Seen with TensorFlow 2.21: with http_proxy or https_proxy set, two workers on one host wait for each other for ever.
"""

from collections.abc import Iterable, Mapping

# In the order in which gRPC looks (grpc/doc/environment_variables.md); of each kind it takes the first that is set.
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
_EXCEPTIONS = ("no_grpc_proxy", "no_proxy")


def grpc_proxy(environment: Mapping[str, str]) -> str | None:
    """Return the name of the variable whose proxy gRPC takes."""
    return next((name for name in _PROXIES if environment.get(name)), None)


def without_proxy(environment: Mapping[str, str], hosts: Iterable[str]) -> dict[str, str]:
    """Return what to set so that gRPC goes to these hosts directly; nothing is to be set without a proxy."""
    if grpc_proxy(environment) is None:
        return {}
    given = next((environment[name] for name in _EXCEPTIONS if environment.get(name)), "")
    direct = [name for name in given.split(",") if name]
    names = [host.strip("[]") for host in hosts]  # gRPC knows IPv6 addresses without brackets here
    return {_EXCEPTIONS[0]: ",".join(dict.fromkeys([*direct, *names]))}
