"""Every private or unstable name of an upstream, each in one place; `tests/contracts` asks the upstreams for them."""
