# nats-server as pinned in tests/cluster/go.mod.
ARG BASE
FROM ${BASE}
COPY nats-server /usr/bin/nats-server
USER 1000:1000
ENTRYPOINT ["/usr/bin/nats-server"]
