#!/usr/bin/env bash
# Starts one process of a run on each of several hosts, over plain ssh, and ends them together.
#
#   examples/launch/ssh.sh HOST,HOST,... COMMAND...
#
# runs, on the i-th host and in this folder's path there,
#
#   COMMAND... --coordinator FIRST_HOST:PORT --processes HOSTS --process I
#
# Every host needs the same paths, a shared output folder, and ssh without a password. What process 0
# prints comes to this terminal, what the others print to LOGS/process-I.log. Ctrl-C, SIGTERM, or the
# end of this script for whatever reason, sends SIGTERM to all processes.
#
# Environment: PORT (default 29400) of the first host; LOGS (default runs/launch); SSH, the command
# (default "ssh -o BatchMode=yes"). A host may stand in the list twice.
set -euo pipefail

usage() {
  echo "usage: $0 HOST,HOST,... COMMAND..." >&2
  exit 2
}

[[ $# -ge 2 && -n $1 ]] || usage
IFS=, read -ra hosts <<<"$1"
shift
for host in "${hosts[@]}"; do
  [[ -n $host && $host != -* ]] || usage
done
read -ra ssh <<<"${SSH:-ssh -o BatchMode=yes}"
logs=${LOGS:-runs/launch}
mkdir -p "$logs"

# On a host: runs a command, and sends it SIGTERM as soon as standard input ends.
# shellcheck disable=SC2016
remote='exec 3<&0; cd "$1" || exit; shift
"$@" 3<&- </dev/null & command=$!
{ while read -r _ <&3; do :; done; kill -TERM $command; } 2>/dev/null >/dev/null & watcher=$!
wait $command; status=$?
kill $watcher 2>/dev/null
exit $status'

# All hosts read this pipe, and nobody ever writes to it: it ends when this script does.
scratch=$(mktemp -d)
mkfifo "$scratch/alive"
exec {alive}<>"$scratch/alive"
pids=()
# shellcheck disable=SC2329  # a trap calls it
stop() {
  echo "ssh.sh: stopping all processes" >&2
  exec {alive}>&-
  trap 'kill -KILL "${pids[@]}" 2>/dev/null; exit 1' INT TERM
}
trap stop INT TERM
trap 'rm -rf "$scratch"' EXIT

for i in "${!hosts[@]}"; do
  place=(--coordinator "${hosts[0]#*@}:${PORT:-29400}" --processes "${#hosts[@]}" --process "$i")
  line=$(printf '%q ' bash -c "$remote" "process-$i" "$PWD" "$@" "${place[@]}")
  (
    # Ctrl-C is for this script; ssh ends when its host's command does.
    trap '' INT
    if [[ $i != 0 ]]; then exec >"$logs/process-$i.log" 2>&1; fi
    exec "${ssh[@]}" "${hosts[i]}" "$line" <"$scratch/alive" {alive}>&-
  ) &
  pids+=($!)
done

result=0
for i in "${!pids[@]}"; do
  status=0
  wait "${pids[i]}" || status=$?
  while kill -0 "${pids[i]}" 2>/dev/null; do # a signal ended the waiting, not the process
    status=0
    wait "${pids[i]}" || status=$?
  done
  if [[ $status != 0 ]]; then
    echo "ssh.sh: process $i on ${hosts[i]} ended with status $status" >&2
    if [[ $i != 0 ]]; then tail -n 5 "$logs/process-$i.log" >&2; fi
    [[ $result != 0 ]] || result=$status
  fi
done
exit "$result"
