#!/usr/bin/env bash
# A conversion on the hosts of a Cloud TPU slice, without Kubernetes: Ray on every host, the command on host 0, and Ray gone afterwards.
set -euo pipefail

usage() {
    cat <<'END'
usage: tpu-vm.sh --tpu NAME --zone ZONE [OPTION]... [-- OPTIONS OF shardconv run]

Runs `shardconv run configs/llama70b.toml` on host 0 of a TPU slice, with Ray on all its hosts, and ends with its exit code: after 5 the
same call goes on. Needs gcloud here, logged in, and the slice, such as

    gcloud compute tpus tpu-vm create NAME --zone=ZONE --accelerator-type=v5p-64 --version=v2-alpha-tpuv5

  --tpu NAME       the slice
  --zone ZONE      its zone
  --project ID     its project, if not gcloud's own
  --work DIR       where all hosts have mounted a disk with configs/, checkpoints/ and converted/ in it (/mnt/work)
  --install SPEC   first install this on all hosts, such as "shardconv ray==2.60.0"
  --cpus N         units at a time on each host: what the shared disk can feed (64)
  --port PORT      where Ray's head listens (6379)
  --keep           leave Ray running, for another call or a look
  --dry-run        only show the commands
  -h, --help       this text

`-- --placement mesh --set mesh.processes=8` places the arrays on a slice of 8 hosts; without it no process opens a TPU.
END
}

tpu='' zone='' project='' work=/mnt/work install='' cpus=64 port=6379 keep=false dry=false more=()
while [ $# -gt 0 ]; do
    case $1 in
    --tpu | --zone | --project | --work | --install | --cpus | --port)
        [ $# -gt 1 ] || { echo "tpu-vm.sh: $1 needs a value" >&2; exit 2; }
        printf -v "${1#--}" %s "$2"
        shift 2
        ;;
    --keep) keep=true; shift ;;
    --dry-run) dry=true; shift ;;
    -h | --help) usage; exit 0 ;;
    --) shift; more=("$@"); break ;;
    *) echo "tpu-vm.sh: $1 is not an option; --help shows them" >&2; exit 2 ;;
    esac
done
if [ -z "$tpu" ] || [ -z "$zone" ]; then
    echo "tpu-vm.sh: --tpu and --zone are needed; --help shows all options" >&2
    exit 2
fi
where=("--zone=$zone" ${project:+"--project=$project"})

call() {
    if "$dry"; then printf '%q ' "$@"; echo; else "$@"; fi
}

# A command on some hosts: 0, or 1,2,3, or all.
on() {
    call gcloud compute tpus tpu-vm ssh "$tpu" "${where[@]}" --worker="$1" --command="$2"
}

if "$dry"; then
    ips=(HOST0 HOST1)
else
    IFS=';' read -r -a ips < <(gcloud compute tpus tpu-vm describe "$tpu" "${where[@]}" --format='value(networkEndpoints[].ipAddress)')
fi
address="${ips[0]}:$port"

# All hosts need the same token, or none would keep others in the network from using this Ray. RAY_AUTH_MODE is said everywhere: a host
# without it could not join.
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
(umask 077 && head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$folder/ray_token")
call gcloud compute tpus tpu-vm scp "$folder/ray_token" "$tpu:ray_token" "${where[@]}" --worker=all
# shellcheck disable=SC2016  # the host's home
auth='export PATH=$HOME/.local/bin:$PATH RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$HOME/ray_token;'

if [ -n "$install" ]; then
    on all "pip install --user --quiet $install"
fi

if ! "$keep"; then
    trap 'rm -rf "$folder"; on all "$auth ray stop; rm -f \"\$HOME/ray_token\"" || true' EXIT
fi

# On a TPU host Ray asks the metadata server which slice this is, and makes its resources of that: TPU: 4 on every host of a v5p-64,
# TPU-v5p-64-head: 1 on host 0. It loads no JAX. Nothing is put into the object store; Ray's default would be 30% of the memory.
start="--num-cpus=$cpus --object-store-memory=83886080 --disable-usage-stats"
on 0 "$auth ray start --head --port=$port $start"
if [ "${#ips[@]}" -gt 1 ]; then
    on "$(seq -s , 1 $((${#ips[@]} - 1)))" "$auth ray start --address=$address $start"
fi

options=''
[ "${#more[@]}" -eq 0 ] || printf -v options ' %q' "${more[@]}"
code=0
on 0 "$auth cd $(printf %q "$work") && shardconv run configs/llama70b.toml --address $address$options" || code=$?
exit "$code"
