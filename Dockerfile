# unbackdoor on the CPU, for pipelines:
#   docker build -t unbackdoor .
#   docker run --rm --network none -v "$PWD:/work" unbackdoor inspect model.pth
# It runs as a user without rights, and needs no network.
FROM python:3.12-slim AS build
WORKDIR /source
# The build of torch without CUDA is a tenth of the size.
RUN python -m venv /opt/unbackdoor \
 && /opt/unbackdoor/bin/pip install --no-cache-dir torch --index-url https://download.pytorch.org/whl/cpu
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN /opt/unbackdoor/bin/pip install --no-cache-dir ".[parquet,report,scan,onnx]"

FROM python:3.12-slim
COPY --from=build /opt/unbackdoor /opt/unbackdoor
ENV PATH=/opt/unbackdoor/bin:$PATH PYTHONUNBUFFERED=1 UNBACKDOOR_CACHE=/tmp/unbackdoor
RUN useradd --create-home --uid 1000 auditor
USER auditor
WORKDIR /work
ENTRYPOINT ["unbackdoor"]
CMD ["--help"]
