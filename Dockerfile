# syntax=docker/dockerfile:1
# Built once with all tools, run with none: the last stage holds the program, its C library, a CA bundle and nothing
# else: no shell, no package manager.

FROM debian:trixie-slim AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential ca-certificates rustup \
    && rm -rf /var/lib/apt/lists/*
RUN rustup toolchain install stable --profile minimal
WORKDIR /src
COPY . .
RUN cargo build --release --locked --bin keyfold \
    && install -D target/release/keyfold /out/usr/bin/keyfold \
    && install -d -m 0700 -o 65532 -g 65532 /out/var/lib/keyfold

FROM gcr.io/distroless/cc-debian13:nonroot
COPY --from=build --chown=65532:65532 /out/var/lib/keyfold /var/lib/keyfold
COPY --from=build /out/usr/bin/keyfold /usr/bin/keyfold
USER 65532:65532
VOLUME /var/lib/keyfold
EXPOSE 8600
ENV KEYFOLD_DATA_DIR=/var/lib/keyfold
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s CMD ["/usr/bin/keyfold", "health"]
ENTRYPOINT ["/usr/bin/keyfold"]
CMD ["serve"]
