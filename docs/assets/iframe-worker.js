// Browsers refuse workers to pages opened from disk. There, the search worker's script runs in a hidden frame instead.
if (location.protocol === "file:") {
  const prelude = `
    postMessage = data => parent.postMessage(data, "*");
    importScripts = (...urls) => Promise.all(urls.map(url => new Promise((done, failed) =>
      document.head.append(Object.assign(document.createElement("script"), { src: url, async: false, onload: done, onerror: failed })))));
  `
  window.IFrameWorker = window.Worker = class IFrameWorker extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      frame.srcdoc = `<script>${prelude}</script><script src="${new URL(url, location.href)}"></script>`
      this.ready = new Promise(done => frame.addEventListener("load", () => done(frame.contentWindow)))
      this.terminate = () => frame.remove()
      addEventListener("message", event => {
        if (event.source === frame.contentWindow) this.dispatchEvent(new MessageEvent("message", { data: event.data }))
      })
      document.body.append(frame)
    }
    postMessage(data) {
      this.ready.then(worker => window.postMessage.call(worker, data, "*")) // ours: the frame's own one answers
    }
  }
}
