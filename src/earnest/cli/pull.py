"""`earnest pull`: download a checkpoint from the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

import click

from earnest import hub
from earnest.cli.terminal import json_option, out, print_json, progress_bar

EPILOG = """\b
Examples:
  earnest pull baidu/ERNIE-4.5-0.3B-PT
  earnest pull baidu/ERNIE-4.5-21B-A3B-Base-PT --to ./base
  earnest pull someone/ERNIE-4.5-21B-GGUF --file "*Q4_0.gguf"
"""


@click.command(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("repo")
@click.option("--revision", help="Branch, tag or commit (default: the main branch).")
@click.option(
    "--to", "destination", type=click.Path(path_type=Path), help="Folder (default: the cache)."
)
@click.option("--file", "files", multiple=True, help="Only these files (shell patterns).")
@json_option
def command(
    repo: str,
    revision: str | None,
    destination: Path | None,
    files: tuple[str, ...],
    as_json: bool,
) -> None:
    """Download the checkpoint REPO (owner/name) from the Hugging Face hub.

    Only what Earnest reads is fetched; pickled weights never are. A broken download is resumed by
    the same command. HF_TOKEN and HF_ENDPOINT are honoured.
    """
    with progress_bar("downloading") as progress:
        path = hub.pull(
            repo, revision=revision, destination=destination, files=files, progress=progress
        )
    if as_json:
        print_json({"repo": repo, "path": str(path)})
    else:
        out.print(f"{repo} is in {path}", markup=False)
