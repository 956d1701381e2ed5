#!/usr/bin/env bash
# A Ray cluster on machines with ssh, without Kubernetes and without a cloud.
#
#   cluster.sh start  HOSTS   start Ray on the machines where it does not run yet; safe to repeat
#   cluster.sh status HOSTS   show where Ray runs, and its resources
#   cluster.sh stop   HOSTS   stop what `start` started, and nothing else
#
# HOSTS is a file with one machine per line, the head first: [user@]address, then optional flags of `ray start`:
#   ubuntu@10.0.0.10 --num-cpus=0
#   ubuntu@10.0.0.11 --num-gpus=2 --object-store-memory=20000000000
# Workers must be able to reach the head at this address, on any port. The dashboard listens only on the head itself.
#
# Environment:
#   NIGHTSHIFT_IMAGE    run Ray in a container of this image; Docker is needed on every machine
#   NIGHTSHIFT_VENV     otherwise run Ray from this virtual environment of every machine (default: ~/nightshift/.venv)
#   NIGHTSHIFT_SSH      the ssh command (default: ssh)
#   NIGHTSHIFT_PORT     port of the head for workers (default: 6379)
#   RAY_AUTH_TOKEN_PATH token file on this machine (default: ~/.ray/auth_token); created if it does not exist
set -euo pipefail

readonly READY_SECONDS=60
readonly STOP_SECONDS=20
port=${NIGHTSHIFT_PORT:-6379}
token_file=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
venv=${NIGHTSHIFT_VENV:-nightshift/.venv}
image=${NIGHTSHIFT_IMAGE:-}
read -ra ssh <<<"${NIGHTSHIFT_SSH:-ssh}"

die() {
  printf 'cluster.sh: %s\n' "$1" >&2
  exit 2
}

# on TARGET: run the script on standard input there. Secrets are passed this way, never on a command line.
on() {
  "${ssh[@]}" -o BatchMode=yes -o ConnectTimeout=10 "$1" bash -s
}

read_hosts() {
  [[ -r $1 ]] || die "the list of machines $1 cannot be read"
  targets=() flags=()
  local target rest
  while read -r target rest || [[ -n $target ]]; do
    [[ -z $target || $target == \#* ]] && continue
    [[ $target =~ ^([A-Za-z0-9_.-]+@)?[A-Za-z0-9][A-Za-z0-9.:_-]*$ ]] || die "$1: '$target' is not of the form [user@]address"
    [[ $rest =~ ^[A-Za-z0-9_.,:=/\ -]*$ ]] || die "$1: '$rest' has characters that no flag of ray start needs"
    targets+=("$target") flags+=("$rest")
  done <"$1"
  ((${#targets[@]})) || die "$1 names no machine"
  head_address=${targets[0]#*@}
}

make_token() {
  [[ -s $token_file ]] && return
  (umask 077 && mkdir -p "$(dirname "$token_file")" && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$token_file")
}

# Prints the functions that every remote script starts with: is_running, start_ray FLAGS…, stop_ray,
# ray_command ARGUMENTS…, read_log.
# All files are in ~/.nightshift. A stored pid counts only if its process has the stored start time: pids are reused.
runtime() {
  printf 'image=%q venv=%q stop_seconds=%q\n' "$image" "$venv" "$STOP_SECONDS"
  cat <<'REMOTE'
set -euo pipefail
here=$HOME/.nightshift
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$here/token RAY_USAGE_STATS_ENABLED=0
export RAY_idle_worker_killing_time_threshold_ms=600000 # keep idle workers, as in the image
if [[ -n $image ]]; then
  is_running() { [[ $(docker inspect --format '{{.State.Running}}' nightshift 2>/dev/null) == true ]]; }
  start_ray() {
    docker rm --force nightshift >/dev/null 2>&1 || true
    local gpus=() keys=() shared_kib
    if command -v nvidia-smi >/dev/null; then gpus=(--gpus all); fi
    if [[ -d $HOME/.aws ]]; then keys=(--volume "$HOME/.aws:/tmp/.aws:ro"); fi
    shared_kib=$(awk '/MemTotal/ {print int($2 * 0.35)}' /proc/meminfo)
    docker run --detach --name nightshift --init --network host --shm-size "${shared_kib}k" \
      --env HOME=/tmp --env USER=nightshift --env RAY_AUTH_MODE --env RAY_USAGE_STATS_ENABLED \
      --env RAY_AUTH_TOKEN_PATH=/run/ray-token --volume "$here/token:/run/ray-token:ro" "${keys[@]}" \
      --ulimit nofile=65536:65536 --security-opt no-new-privileges --cap-drop ALL "${gpus[@]}" --user "$(id -u):$(id -g)" \
      "$image" ray start --block "$@" >/dev/null
  }
  stop_ray() { docker stop --time "$stop_seconds" nightshift >/dev/null && docker rm nightshift >/dev/null; }
  ray_command() { docker exec nightshift ray "$@" </dev/null; }
  read_log() { docker logs nightshift 2>&1; }
else
  [[ $venv == /* ]] || venv=$HOME/$venv
  [[ -x $venv/bin/ray ]] || { echo "$HOSTNAME: $venv/bin/ray does not exist; install Nightshift, or set NIGHTSHIFT_VENV" >&2; exit 3; }
  export PATH=$venv/bin:$PATH
  born() { # PID: start time in clock ticks since boot; fails if the process has ended
    local stat fields
    { stat=$(<"/proc/$1/stat"); } 2>/dev/null || return
    read -ra fields <<<"${stat##*) }" # the fields after the name: state, parent, …
    [[ ${fields[0]} != Z ]] && echo "${fields[19]}"
  }
  is_running() {
    local pid birth
    [[ -s $here/pid ]] && read -r pid birth <"$here/pid" && [[ -n $birth && $(born "$pid") == "$birth" ]]
  }
  start_ray() {
    ulimit -n "$(ulimit -Hn)" 2>/dev/null || true # a head has one connection per worker of every machine
    setsid nohup ray start --block "$@" >"$here/log" 2>&1 </dev/null &
    echo "$! $(born $!)" >"$here/pid"
  }
  await_end() { # GROUP: wait up to stop_seconds; fails if the group still runs
    for ((i = 0; i < stop_seconds * 5; i++)); do
      kill -0 -- "-$1" 2>/dev/null || return 0
      sleep 0.2
    done
    return 1
  }
  stop_ray() {
    local group birth
    read -r group birth <"$here/pid"
    kill -TERM -- "-$group"
    # On a busy machine Ray takes longer, and a killed process needs a moment to end.
    await_end "$group" || { kill -KILL -- "-$group" 2>/dev/null && await_end "$group"; } || true
    rm -f "$here/pid"
  }
  ray_command() { ray "$@" </dev/null; }
  read_log() { cat "$here/log"; }
fi
REMOTE
}

start_one() { # INDEX FLAGS…
  local target=${targets[$1]} own_address=
  (($1)) || own_address=$head_address
  {
    runtime
    printf 'own_address=%q\n' "$own_address"
    printf 'flags=(%s) target=%q ready_seconds=%q\n' "${*:2}" "$target" "$READY_SECONDS"
    printf 'token=%q\n' "$(<"$token_file")"
    cat <<'REMOTE'
if is_running; then
  echo "$target: already runs"
  exit
fi
# By default Ray takes the address of the default route: the wrong one of two networks, none without a route.
if [[ " ${flags[*]} " != *" --node-ip-address"* && " $(hostname -I) " == *" $own_address "* && -n $own_address ]]; then
  flags+=("--node-ip-address=$own_address")
fi
(umask 077 && mkdir -p "$here" && printf %s "$token" >"$here/token")
start_ray "${flags[@]}"
for ((i = 0; i < ready_seconds; i++)); do
  is_running || break
  if grep -q 'Ray runtime started' <<<"$(read_log)"; then
    echo "$target: started"
    exit
  fi
  sleep 1
done
echo "$target: Ray did not start: $(read_log | tail -n 5)" >&2
if is_running; then stop_ray; fi
exit 4
REMOTE
  } | on "$target"
}

start() {
  make_token
  start_one 0 --head "--port=$port" --dashboard-host=127.0.0.1 --disable-usage-stats "${flags[0]}" ||
    die "the head did not start; nothing else was started"
  local failed=0 i
  for ((i = 1; i < ${#targets[@]}; i++)); do
    start_one "$i" "--address=$head_address:$port" --disable-usage-stats "${flags[i]}" || failed=$((failed + 1))
  done
  ((failed == 0)) || die "$failed of $((${#targets[@]} - 1)) workers did not start; run the same command again for them"
  cat <<REMOTE
The cluster runs. Forward its dashboard to this machine and submit a job:
  ssh -N -L 8265:127.0.0.1:8265 ${targets[0]} &
  RAY_AUTH_MODE=token python jobs/submit.py embed --address http://127.0.0.1:8265 -- --input … --output …
REMOTE
}

stop() {
  local failed=0 i
  for ((i = ${#targets[@]} - 1; i >= 0; i--)); do
    { runtime; echo "if is_running; then stop_ray; echo '${targets[i]}: stopped'; else echo '${targets[i]}: was not running'; fi"; } |
      on "${targets[i]}" || failed=$((failed + 1))
  done
  ((failed == 0)) || die "$failed machines could not be stopped; run the same command again"
}

status() {
  local down=0 i
  for ((i = 0; i < ${#targets[@]}; i++)); do
    { runtime; echo "if is_running; then echo '${targets[i]}: runs'; else echo '${targets[i]}: does not run'; exit 1; fi"; } |
      on "${targets[i]}" || down=$((down + 1))
  done
  { runtime; printf 'is_running && ray_command status --address %q\n' "$head_address:$port"; } | on "${targets[0]}" || true
  ((down == 0))
}

case ${1:-} in
start | stop | status) (($# == 2)) || die "usage: cluster.sh $1 HOSTS" ;;
*) die 'usage: cluster.sh start|status|stop HOSTS' ;;
esac
read_hosts "$2"
"$1"
