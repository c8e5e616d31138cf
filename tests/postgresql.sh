#!/bin/sh
# A PostgreSQL server of its own for the tests. usage: postgresql.sh start FOLDER | postgresql.sh stop FOLDER
# FOLDER (short: it holds a socket) is what clients connect to: postgresql+psycopg://zoo@/optuna?host=FOLDER
# Installs Debian's packages first where there are none and the user is root; exits 77 with a reason where it cannot.
set -eu
folder=$2
programs() { ls -d /usr/lib/postgresql/*/bin 2>/dev/null | sort -V | tail -n 1; }
# PostgreSQL refuses to run as root
as=""
[ "$(id -u)" != 0 ] || as="runuser -u postgres --"

install() {
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        echo "PostgreSQL is not installed, and only root on Debian can install it here"
        exit 77
    fi
    # Only the programs: no server that starts by itself
    mkdir -p /etc/postgresql-common
    [ -e /etc/postgresql-common/createcluster.conf ] || echo "create_main_cluster = false" >/etc/postgresql-common/createcluster.conf
    apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends postgresql || {
        echo "Debian's packages of PostgreSQL cannot be installed"
        exit 77
    }
}

case $1 in
start)
    [ -n "$(programs)" ] || install
    mkdir -p "$folder"
    [ -z "$as" ] || chown postgres "$folder"
    cd "$folder"
    $as "$(programs)/initdb" --auth=trust --username=zoo --pgdata="$folder/data"
    $as "$(programs)/pg_ctl" --pgdata="$folder/data" --log="$folder/log" --wait \
        --options="-c listen_addresses='' -c unix_socket_directories='$folder'" start
    $as "$(programs)/createdb" --host="$folder" --username=zoo optuna
    ;;
stop)
    cd "$folder"
    $as "$(programs)/pg_ctl" --pgdata="$folder/data" --mode=immediate --wait stop
    ;;
esac
