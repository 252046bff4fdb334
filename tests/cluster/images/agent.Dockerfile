# What end-to-end tests run inside a cluster: a small HTTP server and a load generator.
ARG BASE=gcr.io/distroless/cc-debian12:nonroot
FROM ${BASE}
COPY testbed-agent /testbed-agent
USER 65532:65532
ENTRYPOINT ["/testbed-agent"]
