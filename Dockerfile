# The three commands on one machine with NVIDIA GPUs: vLLM's own image, and synth beside it.
#
#   docker build -t synth .
#   docker run --rm --gpus all --ipc host -v "$PWD":/work -e HF_HOME=/hub -v "$HOME/.cache/huggingface":/hub \
#     synth generate --source folder:photos
#
# deploy/install.sh does all that is done here; it runs as well in any environment that has vLLM.
ARG VLLM_VERSION=v0.33.0
FROM vllm/vllm-openai:${VLLM_VERSION}
COPY . /opt/synth
RUN sh /opt/synth/deploy/install.sh /opt/synth
WORKDIR /work
ENTRYPOINT ["synth"]
CMD ["--help"]
