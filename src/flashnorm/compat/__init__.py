"""What FlashNorm relies on in other packages ("upstreams") beyond their documented interfaces: a file for each.

* The rest of FlashNorm takes these names from here, and does not look at the version of an upstream.
* Each entry is a small function, or data, with a line that says what is relied on. `tests/contracts` checks it against
  the installed upstream.
* Nothing here uses anything of FlashNorm but its errors.
"""
