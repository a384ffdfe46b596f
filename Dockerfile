# Image for runs on Docker and Kubernetes (docs/deployment.md): this checkout in /overnight; mount
# runs/ and data/ there. torch brings CUDA; the host needs NVIDIA's driver and container toolkit.
#
#     docker build --tag overnight .
#     docker run --rm --gpus all --volume "$PWD/data:/overnight/data" \
#         --volume "$PWD/runs:/overnight/runs" overnight overnight run configs/gpt-576.toml
FROM python:3.12-slim

# torch.compile needs a C compiler.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

ENV DO_NOT_TRACK=1 \
    MLFLOW_DISABLE_TELEMETRY=true \
    PIP_CONSTRAINT=/overnight/constraints.txt \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PREFECT_SERVER_ANALYTICS_ENABLED=false

WORKDIR /overnight
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY gpt gpt
COPY tasks tasks
COPY flows flows
RUN pip install --editable '.[turbo,stores]'
COPY configs configs
COPY prefect.yaml ./

# The user owns only the folders that it writes to.
RUN useradd --create-home --uid 1000 overnight \
    && mkdir --parents runs data \
    && chown overnight:overnight runs data
USER overnight
CMD ["overnight", "--help"]
