#!/bin/sh
# Build cpu.Dockerfile and check its image in Docker: the server on a read-only root, without
# capabilities and without a network, until it is healthy, has answered a request and has stopped.
#
#   containers/check_image.sh                     # arguments are passed on to `docker build`
#
# Without access to a registry, the base is a Debian root of one's own:
#
#   debootstrap --variant=minbase bookworm base
#   tar -C base -c . | docker import - debian-base
#   containers/check_image.sh --build-arg BASE=debian-base
set -eu
root=$(realpath "$(dirname "$0")/..")
image=coprs-deploy:cpu
docker build -f "$root/containers/cpu.Dockerfile" -t "$image" "$@" "$root"
owned=$(docker run --rm --network none --user root --entrypoint find "$image" / -xdev -user 10001)
[ "$owned" = /cache ] || { echo "the server's user owns more than /cache: $owned"; exit 1; }

server=$(docker run --detach --network none --read-only --tmpfs /tmp --cap-drop ALL \
    --security-opt no-new-privileges "$image")
trap 'docker rm --force --volumes "$server" >/dev/null' EXIT
state() { docker inspect --format "{{.State.$1}}" "$server"; }
while [ "$(state Running) $(state Health.Status)" = "true starting" ]; do sleep 1; done
docker logs "$server"
[ "$(state Health.Status)" = healthy ] || { echo "not healthy: $(state Health.Log)"; exit 1; }

docker exec --interactive "$server" python3 - <<'PYTHON'
import importlib.util, json, os, pathlib, shutil, urllib.request

status = dict(line.split(":\t") for line in pathlib.Path("/proc/1/status").read_text().splitlines())
assert status["Uid"].split() == ["10001"] * 4, status["Uid"]
assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0, status
assert os.statvfs("/").f_flag & os.ST_RDONLY
tools = [name for name in ("pip", "pip3", "cc", "gcc", "make") if shutil.which(name)]
modules = [name for name in ("pip", "setuptools", "ensurepip") if importlib.util.find_spec(name)]
assert not tools + modules, tools + modules


def read(request):
    with urllib.request.urlopen(request, timeout=60) as reply:
        return reply.read()


url = "http://127.0.0.1:8000/"
assert b"swagger-ui" in read(url + "docs")
sample = json.loads(read(url + "samples"))[0]
head = '--x\r\nContent-Disposition: form-data; name="{}"{}\r\n\r\n'
body = head.format("instruction", "").encode() + sample["instruction"].encode() + b"\r\n"
body += head.format("image", '; filename="a"').encode() + read(url + sample["image"])
kind = {"Content-Type": "multipart/form-data; boundary=x"}
result = json.loads(read(urllib.request.Request(url + "segment", body + b"\r\n--x--\r\n", kind)))
assert result["found"], result
assert b'path="/segment"' in read(url + "metrics")
assert os.listdir("/tmp") == [], "uploads or the files of a library's telemetry are left"
print(result["response"], result["runtime"], sep="\n")
PYTHON
docker stop --time 20 "$server" >/dev/null
[ "$(state ExitCode)" = 0 ] || { echo "stopped with $(state ExitCode)"; exit 1; }
docker image inspect --format '{{.Size}} bytes: healthy, answered, stopped with 0' "$image"
