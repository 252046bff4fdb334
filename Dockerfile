# The images of the exchange and of its operator, all from one build.
#
#   docker build --target exchange -t ghcr.io/acme/exchange:1.0.0 .
#   docker build --target exchange --build-arg BINARY=exchange-2 -t ghcr.io/acme/exchange:2.0.0 .
#
# `exchange` is one image for all services and tools of a release; `exchange-user`, `exchange-trade` and
# `exchange-notification` are the same with a service chosen. docs/releases.md says which binaries there are.
#
# Where the binaries are built outside (no Docker, no image registry), `make images` passes
# BINARIES=prebuilt and a BASE of its own; see docs/architecture.md.
ARG BASE=gcr.io/distroless/cc-debian12:nonroot
ARG BINARIES=compiled

FROM docker.io/library/rust:1.95-bookworm AS compiled
WORKDIR /src
COPY . .
RUN cargo build --release --locked --package exchange --package exchange-operator \
 && mkdir /out && cd target/release && cp exchange exchange-2 exchange-faulty exchange-operator /out/

# The context must then have the binaries in dist/. (A builder that makes every stage, also those that are not used, finds at
# least the license.)
FROM scratch AS prebuilt
COPY LICENSE dist* /out/

FROM ${BINARIES} AS binaries

FROM ${BASE} AS exchange-operator
COPY --from=binaries /out/exchange-operator /usr/bin/exchange-operator
USER 65532:65532
ENTRYPOINT ["/usr/bin/exchange-operator"]
CMD ["run"]

FROM ${BASE} AS exchange
ARG BINARY=exchange
COPY --from=binaries /out/${BINARY} /usr/bin/exchange
USER 65532:65532
ENTRYPOINT ["/usr/bin/exchange"]

# For tests only, with BINARY=exchange-faulty: a release with a fault.
FROM exchange AS exchange-faulty
ARG FAULT
ENV EXCHANGE_FAULT=${FAULT}

FROM exchange AS exchange-user
CMD ["user"]

FROM exchange AS exchange-trade
CMD ["trade"]

FROM exchange AS exchange-notification
CMD ["notification"]
