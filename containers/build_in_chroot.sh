#!/bin/sh
# Build cpu.Dockerfile and run its server without a container engine: buildah with chroot
# isolation on a base made by debootstrap, then the image as its user, without capabilities, on a
# read-only root. What an engine adds (namespaces of the network, HEALTHCHECK itself) stays unseen.
#
#   apt-get install buildah debootstrap        # as root, on Debian 12
#   containers/build_in_chroot.sh WORK_DIR
set -eu
work=$(realpath "${1:?usage: containers/build_in_chroot.sh WORK_DIR}")
root=$(realpath "$(dirname "$0")/..")
port=${PORT:-18765}
build="buildah --root $work/storage --runroot $work/run"

if ! $build inspect --type image localhost/debian:bookworm >/dev/null 2>&1; then
    [ -d "$work/base" ] ||
        debootstrap --variant=minbase --include=ca-certificates bookworm "$work/base"
    tar -C "$work/base" -cf "$work/base.tar" .
    printf 'FROM scratch\nADD base.tar /\n' >"$work/base.Dockerfile"
    $build bud --isolation chroot -t localhost/debian:bookworm -f "$work/base.Dockerfile" "$work"
fi
$build bud --isolation chroot --format docker --pull-never \
    --build-arg BASE=localhost/debian:bookworm --volume /etc/ssl/certs:/etc/ssl/certs:ro \
    -t localhost/coprs-deploy:cpu -f "$root/containers/cpu.Dockerfile" "$root"

container=$($build from --pull-never localhost/coprs-deploy:cpu)
mounted=$($build mount "$container")
trap '$build umount "$container" >/dev/null; $build rm "$container" >/dev/null' EXIT
echo "image: $(du -sm "$mounted" | cut -f1) MB"
$build inspect --type image --format '{{.Docker.Config.User}} {{.Docker.Config.Healthcheck}}' \
    localhost/coprs-deploy:cpu

cat >"$mounted/run-check" <<EOF
touch /opt/written 2>/dev/null && { echo "the root is not read-only"; exit 1; }
id
coprs-deploy serve --host 127.0.0.1 --port $port & server=\$!
for second in \$(seq 120); do
    python3 -c "import urllib.request as r; r.urlopen('http://127.0.0.1:$port/health', timeout=4)" \
        2>/dev/null && break
    sleep 1
done
python3 - <<PYTHON
import json, urllib.request
url = "http://127.0.0.1:$port/"
sample = json.load(urllib.request.urlopen(url + "samples"))[0]
image = urllib.request.urlopen(url + sample["image"]).read()
head = '--x\r\nContent-Disposition: form-data; name="{}"{}\r\n\r\n'
body = head.format("instruction", "").encode() + sample["instruction"].encode() + b"\r\n"
body += head.format("image", '; filename="a"').encode() + image + b"\r\n--x--\r\n"
kind = {"Content-Type": "multipart/form-data; boundary=x"}
request = urllib.request.Request(url + "segment", body, kind)
result = json.load(urllib.request.urlopen(request, timeout=60))
print(result["found"], result["response"], result["runtime"])
assert result["found"]
PYTHON
kill -TERM \$server
wait \$server
EOF
unshare --mount --pid --fork sh -eu -c '
    mount --bind "$1" "$1"
    mount -o remount,bind,ro "$1"
    mount -t tmpfs -o mode=1777 tmpfs "$1/tmp"
    mount -t tmpfs -o mode=1777 tmpfs "$1/cache"
    mount --rbind /dev "$1/dev"
    mount -t proc proc "$1/proc"
    exec chroot "$1" setpriv --reuid 10001 --regid 10001 --clear-groups --no-new-privs \
        --bounding-set=-all --inh-caps=-all env -i PATH=/opt/coprs/bin:/usr/bin:/bin HOME=/tmp \
        COPRS_DEPLOY_CACHE=/cache PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 sh -eu /run-check
' sh "$mounted"
echo "the server answered and stopped with 0"
