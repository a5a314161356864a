# synth in the image of vLLM, for one machine with NVIDIA GPUs.
#
#   docker build -t synth .
#   docker run --rm --gpus all --ipc host -v "$PWD":/work -e HF_HOME=/hub -v "$HOME/.cache/huggingface":/hub \
#     synth generate --source folder:photos
#
# deploy/install.sh does the installation; it also works in other environments with vLLM.
ARG VLLM_VERSION=v0.33.0
FROM vllm/vllm-openai:${VLLM_VERSION}
COPY . /opt/synth
RUN sh /opt/synth/deploy/install.sh /opt/synth
WORKDIR /work
ENTRYPOINT ["synth"]
CMD ["--help"]
