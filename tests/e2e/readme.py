"""Do what the README shows, as a newcomer who has the wheels alone: `make test-wheels`.

`python -I readme.py README FOLDER`, with the interpreter of an environment that they are installed in.
The model has the shape of SmolLM2-135M, and weights that were drawn.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

STATUS = {"plan": 2}
"""By command: what a command exits with that did what it was asked; 0 for others."""


def main(readme: Path, folder: Path) -> None:
    """Run all blocks in an empty folder.

    Raises:
        AssertionError: A command failed, or something was printed that is not what is shown.
    """
    text, readme_folder = readme.read_text(), readme.resolve().parent
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    import surgery_core  # noqa: PLC0415 (where it is from is what is looked at)

    assert readme_folder / "surgery_core" not in Path(surgery_core.__file__).parents
    write_model(folder / "smollm2")
    (folder / "path/to").mkdir(parents=True)
    (folder / "path/to/model").symlink_to(folder.resolve() / "smollm2")
    (recipe,) = blocks(text, "yaml")
    (folder / "recipe.yaml").write_text(recipe)

    for command, shown in commands(text):
        words = shlex.split(command, comments=True)
        if words[0] == "surgery":
            print(f"$ {command}", flush=True)  # noqa: T201 (a program)
            program = str(Path(sys.executable).with_name("surgery"))
            printed = run([program, *words[1:]], folder, STATUS.get(words[1], 0))
            assert not shown or shown == printed, f"Shown:\n{shown}\nPrinted:\n{printed}"
        if claimed := re.search(r"(\d+) kB", command):
            size = sum(path.stat().st_size for path in (folder / words[-1]).rglob("*.*"))
            assert abs(size / 1000 - int(claimed[1])) < 5, size
    printed = run([sys.executable, "-I", "-c", "".join(blocks(text, "python"))], folder, 0)
    assert "".join(blocks(text, "text")).rstrip() == printed, printed
    print("The README's recipe, commands and Python do what it says.")  # noqa: T201 (a program)


def write_model(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415 (after what is printed)

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> Iterator[tuple[str, str]]:
    """Yield each command of the console, and what is shown below it."""
    for block in blocks(text, "console"):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, shown = part.partition("\n")
            yield command, shown.rstrip()


def run(command: list[str], folder: Path, status: int) -> str:
    """Return what a command printed, with the folder's own path as a dot."""
    environment = {name: v for name, v in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"COLUMNS": "200", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(  # noqa: S603 (what the README says)
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == status, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout.replace(str(folder.resolve()), ".").rstrip()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
