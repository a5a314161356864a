"""Generate a dataset from 64 photos with a real model, and print one page to paste into an issue.

usage: python -m tests.check_real --repo ORG/NAME [--source flickr30k] [--out check-real]

The dataset is pushed as a private one, and a captioner is trained for 50 steps.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from pipeline.config.files import resolve
from pipeline.doctor import Finding, examine
from pipeline.errors import SynthError
from pipeline.inference.vllm import has_gpu
from pipeline.plan import describe_engine
from pipeline.progress import show_progress
from pipeline.run import RunResult, generate_dataset
from pipeline.text.escape import visible

IMAGES, SHOWN_CAPTIONS, STEPS = 64, 20, 50


def describe_run(result: RunResult, findings: list[Finding]) -> str:
    stats, choice = result.stats, result.plan.engine
    assert choice is not None
    lines = ["```", *(f"{finding.name}: {finding.result}" for finding in findings if finding.name != "hub")]
    lines.append(f"model: {choice.model}, {describe_engine(result.plan)}")
    seconds = max(stats.asking_s, 1e-9)
    lines.append(
        f"requests: {stats.asked:,} in {stats.asking_s:,.1f} s, {stats.asked / seconds:.2f} per second"
    )
    lines.append(f"tokens: {stats.shown_about}{stats.prompt_tokens:,} read, {stats.reply_tokens:,} written")
    lines.append(f"unusable replies: {dict(stats.flaws) or 'none'}")
    for step in result.funnel:
        rejected = {reason: f"{number / step.input:.1%}" for reason, number in step.rejected.items()}
        lines.append(f"{step.step}: {step.kept:,} of {step.input:,} {rejected or ''}".rstrip())
    lines += ["captions:", *(f"- {visible(text)}" for text in _captions(result)), "```"]
    return "\n".join(lines)


def _captions(result: RunResult) -> list[str]:
    """Return the first captions of the version, one for each image."""
    texts: list[str] = []
    for _, batch in result.version.batches(["captions"]):
        texts += [captions[0]["text"] for captions in batch["captions"].to_pylist() if captions]
    return texts[:SHOWN_CAPTIONS]


def further_commands(dataset: str, repo: str) -> list[list[str]]:
    """Return the commands of `synth` that push the dataset and train a captioner."""
    return [["push", dataset, "--repo", repo, "--private"], ["train", dataset, "--steps", str(STEPS)]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repo", required=True)
    parser.add_argument("--source", default="flickr30k")
    parser.add_argument("--out", type=Path, default=Path("check-real"))
    arguments = parser.parse_args()
    if not has_gpu():
        sys.exit("check-real needs an NVIDIA GPU, and nvidia-smi finds none")
    try:
        with show_progress() as progress:
            result = generate_dataset(resolve(source=arguments.source, limit=IMAGES), arguments.out, progress)
    except SynthError as error:
        sys.exit(f"{error}\n  hint: {error.hint}")
    print(describe_run(result, examine()))
    for command in further_commands(str(arguments.out), arguments.repo):
        subprocess.run([sys.executable, "-m", "pipeline", *command], check=True)


if __name__ == "__main__":
    main()
