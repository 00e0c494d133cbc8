"""Settings of all tests."""

import os

from hypothesis import settings

# Continuous integration runs the same examples every time; everybody else finds new ones.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")
