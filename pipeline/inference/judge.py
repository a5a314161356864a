"""The judge: another model than the writer, on a server of its own, that rates texts by a rubric."""

import os

from pipeline.config import Config
from pipeline.config.addresses import AT_SERVER, address_of, origin_of
from pipeline.digests import has_common_revision
from pipeline.errors import ConfigError
from pipeline.inference.client import Client
from pipeline.inference.endpoints import JUDGE_KEY
from pipeline.inference.engines import EngineChoice
from pipeline.inference.probing import find_model
from pipeline.progress import Progress


def choose_judge(
    config: Config, writer_revision: str, progress: Progress | None = None, writer: str | None = None
) -> EngineChoice:
    """Choose the judge of `verify.judge`, MODEL@URL.

    Raises ConfigError if no server is named, or the judge is the writer (by its revision, or by its name `writer`) and must not
    be; EngineError if the server does not answer, or does not serve the model.
    """
    name, url = (config.verify.judge or "").partition(AT_SERVER)[0], config.judge_url
    if not url:
        raise ConfigError(f"the judge {name} has no server", hint=f"name it: --judge {name}@http://HOST:8000/v1")
    # A host whose servers have keys of their own gets none that is meant for others.
    described, origin = config.server.endpoints, origin_of(url)
    is_described = address_of(url) in map(address_of, described)
    is_known = origin in map(origin_of, config.base_url) and (is_described or origin not in map(origin_of, described))
    server = config.server if is_known else config.server.model_copy(update={"headers": {}, "key_env": None})
    of_judge = config.model_copy(update={"engine": "vllm", "model": name, "base_url": (url,), "server": server})
    key_name = None if is_known and JUDGE_KEY not in os.environ else JUDGE_KEY
    served, revision = find_model(of_judge, key_name)
    is_same_revision = revision == writer_revision and not has_common_revision(served)
    is_writer = is_same_revision or (writer is not None and _without_revision(served) == _without_revision(writer))
    if is_writer and not config.verify.judge_may_be_writer:
        hint = "name another model, or allow it: verify.judge_may_be_writer: true"
        raise ConfigError(f"the judge {name} is the model that writes, and a model likes its own texts", hint=hint)

    def make() -> Client:
        return Client(served, revision, of_judge, progress=progress, key_name=key_name)

    return EngineChoice("vllm", served, revision, "--judge names a server", make)


def _without_revision(name: str) -> str:
    """Return the name of a model without what `synth serve` appends, and without its folder."""
    return name.partition("@")[0].rpartition("/")[2]
