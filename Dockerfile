# One image per service and one for the operator, all from one build.
#
#   docker build --target exchange-trade -t ghcr.io/acme/exchange-trade:1.0.0 .
#
# Where the binaries are built outside (no Docker, no image registry), `make images` passes
# BINARIES=prebuilt and a BASE of its own; see docs/architecture.md.
ARG BASE=gcr.io/distroless/cc-debian12:nonroot
ARG BINARIES=compiled

FROM docker.io/library/rust:1.95-bookworm AS compiled
WORKDIR /src
COPY . .
RUN cargo build --release --locked --package exchange --package exchange-operator \
 && mkdir /out && cp target/release/exchange target/release/exchange-operator /out/

# The context must then have the binaries in dist/.
FROM scratch AS prebuilt
COPY dist/ /out/

FROM ${BINARIES} AS binaries

FROM ${BASE} AS exchange-operator
COPY --from=binaries /out/exchange-operator /usr/bin/exchange-operator
USER 65532:65532
ENTRYPOINT ["/usr/bin/exchange-operator"]
CMD ["run"]

FROM ${BASE} AS exchange
COPY --from=binaries /out/exchange /usr/bin/exchange
USER 65532:65532
ENTRYPOINT ["/usr/bin/exchange"]

FROM exchange AS exchange-user
CMD ["user"]

FROM exchange AS exchange-trade
CMD ["trade"]

FROM exchange AS exchange-notification
CMD ["notification"]
