"""Runs NeMo Data Designer: a structured LLM column with image context, as in its vision tutorial.

The seed dataset contains paths, and each request reads its image. (The tutorial stores base64 in the seed,
which costs more.) The schema is the column's output format, which is added to the prompt and checked in the
reply. Artifacts are stored in `--out`. A second run resumes there (`ResumeMode.IF_POSSIBLE`) with the first
incomplete row group.
"""

import argparse
import os
from pathlib import Path

PROMPT = "Write one sentence that names the main things in view."
CONCURRENCY = 256


def caption(url: str, paths: list[str], out: Path) -> None:
    """Request one caption per image."""
    os.environ |= {
        "HOME": str(out / "home"),
        "DATA_DESIGNER_HOME": str(out / "home"),
        "NEMO_TELEMETRY_ENABLED": "false",
        "HF_HUB_OFFLINE": "1",
    }
    import data_designer.config as dd
    import pandas as pd
    from data_designer.interface import DataDesigner
    from pydantic import BaseModel

    class Caption(BaseModel):
        caption: str

    seed = out / "seed.parquet"
    if not seed.exists():
        pd.DataFrame({"image": paths}).to_parquet(seed, index=False)
    model = dd.ModelConfig(
        alias="captioner",
        model="model",
        provider="endpoint",
        inference_parameters=dd.ChatCompletionInferenceParams(
            temperature=0, max_tokens=256, max_parallel_requests=CONCURRENCY, timeout=600
        ),
        skip_health_check=True,  # the endpoint would count the health check as a request
    )
    builder = dd.DataDesignerConfigBuilder(model_configs=[model])
    builder.with_seed_dataset(dd.LocalFileSeedSource(path=str(seed)))
    builder.add_column(
        dd.LLMStructuredColumnConfig(
            name="caption",
            prompt=PROMPT,
            model_alias="captioner",
            output_format=Caption,
            multi_modal_context=[dd.ImageContext(column_name="image")],
        )
    )
    provider = dd.ModelProvider(name="endpoint", endpoint=url, api_key="none")
    designer = DataDesigner(artifact_path=out / "artifacts", model_providers=[provider])
    designer.set_run_config(dd.RunConfig(otel_metrics_port=None))
    results = designer.create(
        builder, num_records=len(paths), dataset_name="captions", resume=dd.ResumeMode.IF_POSSIBLE
    )
    rows = len(results.load_dataset())
    assert rows == len(paths), f"{rows} of {len(paths)} rows came back"


def main() -> None:
    """Parse the arguments and run Data Designer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    paths = [str(path.resolve()) for path in sorted(arguments.images.glob("*.jpg"))[: arguments.rows]]
    caption(arguments.url, paths, arguments.out.resolve())


if __name__ == "__main__":
    main()
