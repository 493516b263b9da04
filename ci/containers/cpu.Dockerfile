# The CPU, as a container: what the accelerator images are compared with.
# Not verified: this image has never been built. Verified: the lint, and that torch 2.13.0 with
# Python 3.11 on a CPU is what ci/constraints.txt pins and the tests run with.
FROM python:3.11-slim-bookworm

RUN pip install --no-cache-dir torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu

# HOME: whoever runs this may have no entry in /etc/passwd, and pip and the caches need a home.
ENV CPPO_SYSTEM_TORCH=1 HOME=/tmp
USER 1000:1000
WORKDIR /repository
