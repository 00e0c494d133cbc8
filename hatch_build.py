"""Compiles the kernels when the package is built or installed from source. Without a compiler, it goes without them."""

import runpy
import subprocess
import sysconfig
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelsHook(BuildHookInterface):
    """Run `src/flashnorm/cpu/kernels/build.py`."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        kernels = runpy.run_path("src/flashnorm/cpu/kernels/build.py")
        editable = version == "editable"
        try:
            if not (editable and kernels["is_current"]()):
                kernels["build"](only_here=editable)
        except (OSError, subprocess.CalledProcessError) as error:
            self.app.display_warning(f"flashnorm is built without its fused kernels: {error}")
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
