/* The search runs in a worker, which browsers refuse to pages that are opened as files: there a frame takes its place. */
if (location.protocol === "file:")
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.appendChild(frame)
      const base = new URL(url, location.href)
      const inside = frame.contentWindow
      inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }))
      const load = (at) =>
        new Promise((resolve, reject) => {
          const script = inside.document.createElement("script")
          Object.assign(script, { src: new URL(at, base), onload: resolve, onerror: reject })
          inside.document.body.appendChild(script)
        })
      inside.importScripts = (...urls) => urls.reduce((before, at) => before.then(() => load(at)), Promise.resolve())
      this.loaded = load(base)
      this.inside = inside
    }
    postMessage(data) {
      this.loaded.then(() => this.inside.dispatchEvent(new MessageEvent("message", { data })))
    }
    set onmessage(listener) {
      this.addEventListener("message", listener)
    }
    terminate() {}
  }
