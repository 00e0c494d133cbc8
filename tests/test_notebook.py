"""The notebook of the examples runs from its first cell to its last, offline, in a kernel of its own."""

from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

import tiny

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny Llama with a tokenizer of a word for each id."""
    folder = tiny.save(tmp_path / "model", tiny.model(tiny.config("llama", num_hidden_layers=1), torch.bfloat16))
    words = {"<unk>": 0, "The": 1, "moon": 2, "is": 3} | {f"w{index}": index for index in range(4, 128)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return folder


def text(cell: nbformat.NotebookNode) -> str:
    """What a cell printed, and its result as text."""
    outputs = [output for output in cell.outputs if output.output_type != "error"]
    return "".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)


@pytest.mark.slow
def test_every_cell_runs(model: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    (parameters,) = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert 'MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"' in parameters.source
    parameters.source += f"\nMODEL, OUT = {str(model)!r}, {str(tmp_path / 'out')!r}"
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = [text(cell) for cell in code]
    assert "3 norms fold" in printed[1]
    assert "is the same model as" in printed[3]
    assert "<html" in (tmp_path / "report.html").read_text()
    assert "The moon is" in printed[5]
    assert printed[-1] == "True"
