"""For `make docs`: `::: flashnorm.plan` in a page means the function, and not the module that has its name.

Where each public name is, is read off the package's `_HOMES`, without importing it.
"""

import ast
import re
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent.parent / "src" / "flashnorm" / "__init__.py"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for each page."""
    homes = _homes()
    return re.sub(r"^::: flashnorm\.(\w+)$", lambda found: f"::: {homes[found[1]]}.{found[1]}", markdown, flags=re.M)


def _homes() -> dict[str, str]:
    for statement in ast.parse(PACKAGE.read_text()).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "_HOMES":
            return ast.literal_eval(statement.value)
    raise ValueError(f"{PACKAGE}: expected _HOMES, where each public name is; found none")
