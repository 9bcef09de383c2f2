# In a job of PBS Pro, as `sh pbs_rsh.sh HOST WORDS`: runs a line of shell on another node, as rsh would, through PBS.
host=$1
shift
exec pbs_tmrsh "$host" /bin/sh -c "$*"
