# Intel GPUs: PyTorch's own XPU build over Intel's user-space driver for Ubuntu 24.04.
# Not verified: this image has never been built, and cppo has never run in it. The packages are
# those of Intel's installation guide for client GPUs, the index is PyTorch's; the lint passes.
FROM ubuntu:24.04

# Ubuntu's own compute runtime is of 2023 and knows no newer GPU: hence Intel's archive. It keeps
# one version of each package, so that none can be pinned. clinfo: the backend's error names it.
# Triton compiles a launcher for each kernel: a C++ compiler, and Python's headers.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates gpg gpg-agent software-properties-common \
    && add-apt-repository --yes ppa:kobuk-team/intel-graphics \
    && apt-get update \
    && apt-get install --yes --no-install-recommends \
        clinfo intel-opencl-icd libze-intel-gpu1 libze1 \
        g++ python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# Ubuntu's Python takes no packages from pip; a virtual environment does.
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
RUN pip install --no-cache-dir torch==2.13.0 --index-url https://download.pytorch.org/whl/xpu

# HOME: whoever runs this may have no entry in /etc/passwd, and pip and the caches need a home.
ENV CPPO_SYSTEM_TORCH=1 HOME=/tmp
USER 1000:1000
WORKDIR /repository
