# Ascend NPUs: Huawei's CANN image and torch-npu, in versions that its compatibility table pairs
# (CANN 9.1, torch 2.12.0, torch-npu 2.12.0.post2).
# Not verified: this image has never been built, and cppo has never run in it. The tag is from
# public CI that uses it, the versions are from TorchNPU's table; the lint passes.
FROM quay.io/ascend/cann:9.1.0-910b-ubuntu22.04-py3.11

# CANN's operator compiler runs in this Python and imports the packages named here besides torch-npu;
# below Python 3.13 it needs numpy 1.
RUN pip install --no-cache-dir torch==2.12.0 --index-url https://download.pytorch.org/whl/cpu \
    && pip install --no-cache-dir torch-npu==2.12.0.post2 numpy==1.26.4 scipy==1.16.3 \
        pyyaml==6.0.3 setuptools==80.9.0 attrs==25.4.0 decorator==5.2.1 psutil==7.2.2

# CANN is found through variables that its script sets, which only interactive shells source. The
# path changed between versions. Not `set -u`: the script reads variables that are not set.
ENTRYPOINT ["bash", "-c", "for script in /usr/local/Ascend/cann/set_env.sh /usr/local/Ascend/ascend-toolkit/set_env.sh; do if [ -r \"$script\" ]; then source \"$script\"; break; fi; done; exec \"$@\"", "bash"]

# Root, unlike the others: the device nodes belong to the host's driver group, and whether CANN's
# files are readable for anyone else has not been tried.
ENV CPPO_SYSTEM_TORCH=1 HOME=/tmp
WORKDIR /repository
